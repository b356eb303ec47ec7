"""rope_ext in the place of what other libraries rotate with."""
