"""What was used and what it costs: usage events, prices, and the recorder that writes them down."""
