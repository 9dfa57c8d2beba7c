"""Web pages of features: dashboards of a search, and the features of a prompt."""
