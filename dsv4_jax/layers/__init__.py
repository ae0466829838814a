"""The layers of a block, one file each."""
