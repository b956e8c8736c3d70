"""Networks: feature taps, the joint network, projectors, smaller students (torch and network libraries only)."""
