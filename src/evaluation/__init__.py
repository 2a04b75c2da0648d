"""How good reconstructions are: metrics, networks that judge, controls, and the report that shows them."""
