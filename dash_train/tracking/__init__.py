"""What a run tells the world while it trains, and the figures drawn from it afterwards."""
