"""What makes a call run: from a collective as the user asked for it to instructions played over a transport."""
