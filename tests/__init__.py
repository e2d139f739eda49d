"""All tests: unit, integration, end to end, and the clusters that they run on."""
