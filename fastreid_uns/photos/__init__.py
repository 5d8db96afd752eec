"""From a folder of photos to individuals."""
