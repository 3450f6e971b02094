"""Long-context problems that are generated exactly, one family a file, seeded."""
