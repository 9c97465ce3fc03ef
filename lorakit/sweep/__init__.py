"""Many runs of one recipe with other values for some keys: searched, cut short, ranked."""
