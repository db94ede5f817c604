"""Programs that are run in processes of their own, each with the libraries of one method alone."""
