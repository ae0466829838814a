"""FP8 and FP4: the formats, what is stored in them, and the precision policy: which tensor role is rounded how."""
