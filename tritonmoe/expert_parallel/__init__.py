"""One layer call on one of many ranks: checks, agreement, the run, and what is kept between."""
