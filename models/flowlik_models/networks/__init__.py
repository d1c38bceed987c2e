"""Networks: fields, flow maps and joint flow maps on vectors and images."""
