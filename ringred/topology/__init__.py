"""Where ranks are: coordinates on rings, tori and trees, the machine model, and what the machine says of itself."""
