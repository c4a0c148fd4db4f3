"""COVID-19 against the rest in frontal radiographs, and whether the answer comes from the lungs."""
