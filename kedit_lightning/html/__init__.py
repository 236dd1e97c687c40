"""`kedit report`: runs as one HTML page that needs nothing beside it."""
