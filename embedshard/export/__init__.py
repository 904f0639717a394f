"""What leaves a run: vectors, the dense part, an index and a manifest, and what reads them again. No pickle anywhere."""
