"""Draw what was measured. Measures nothing itself; the drawing library is imported only when something is drawn."""
