"""Pictures of measurements. This package measures nothing; the plotting library is imported when a picture is drawn."""
