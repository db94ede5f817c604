"""Judging samples: a classifier of real images, distances between pictures, coverage. Stages import down from here."""
