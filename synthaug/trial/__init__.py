"""The fair trial: recipes, learners, race, statistics."""
