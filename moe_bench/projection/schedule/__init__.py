"""Pipeline schedules, simulated pass by pass."""
