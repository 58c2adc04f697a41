"""What a run costs: memory, FLOPs, traffic between chips and time, predicted for described chips or measured here."""
