"""The projection held against the public record: errors, order, memory, and the constants fitted to it."""
