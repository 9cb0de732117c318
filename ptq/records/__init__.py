"""What did the pipeline find? One module of frozen records for each room that makes them."""
