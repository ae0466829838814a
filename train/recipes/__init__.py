"""Whole runs as data, one file each; `dsv4 train NAME` runs one, `dsv4 train --recipe FILE` runs another."""
