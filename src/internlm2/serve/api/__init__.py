"""The endpoints, one file for each family, and what their requests may hold."""
