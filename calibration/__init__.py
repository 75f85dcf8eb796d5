"""What the passes need to know about the data: samples, ranges, importance."""
