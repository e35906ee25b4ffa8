"""File formats: bytes to named arrays and back. They know no model."""
