"""Integration in time: solvers, grids' rules and quadrature."""
