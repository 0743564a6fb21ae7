"""What two machines must agree on. Imports nothing from the other rooms."""
