"""From strips with masks to a trained member."""
