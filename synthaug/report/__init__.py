"""Pictures and pages: the contact sheet and the dataset card."""
