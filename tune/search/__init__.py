"""What is searched? Space, proposals, measure, configuration of a sweep."""
