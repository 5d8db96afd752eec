"""TransReID-SSL: a transformer that was pre-trained on persons without labels. All of its parts are in the core."""
