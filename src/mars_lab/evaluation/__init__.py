"""What a trained model can do: as a folder other tools read, and on tasks of the field."""
