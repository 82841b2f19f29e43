"""What every long job shares and that knows no model."""
