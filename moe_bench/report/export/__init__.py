"""A record in the formats of experiment trackers, written from the record alone, at any time."""
