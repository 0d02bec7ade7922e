"""VBench: videos in its layout, its scores, and one table of them."""
