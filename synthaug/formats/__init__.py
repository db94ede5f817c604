"""File formats: pictures in, parquet out, and the ways to write a file whole or not at all."""
