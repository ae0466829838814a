"""From text to batches: sources, manifest, token files, packing, and the long-range recall task."""
