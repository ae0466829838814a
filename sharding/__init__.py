"""Meshes and the rules that map logical axes to them; the model only names axes."""
