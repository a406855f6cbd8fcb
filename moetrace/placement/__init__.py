"""What is gained by placing experts by a forecast? Plans, their replay on a trace, and the files of serving systems."""
