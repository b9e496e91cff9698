"""Where ranks are: coordinates on rings, tori and trees, the machine model, and what can be detected of the machine."""
