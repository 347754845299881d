"""What all stages share; imports none of them."""
