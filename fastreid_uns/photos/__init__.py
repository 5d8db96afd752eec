"""The road from a folder of photos to individuals."""
