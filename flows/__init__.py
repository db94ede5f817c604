"""The job as Prefect flows. In the wheel this package is `synthaug.flows`: import from `synthaug`, never from here."""
