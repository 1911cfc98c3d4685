"""What people read: tables and comparisons made from records, never measurements of their own."""
