"""Planning without a cluster: hardware, memory, time, predictions, and the search for a layout."""
