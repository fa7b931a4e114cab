"""All methods beside each other: quality against cost."""
