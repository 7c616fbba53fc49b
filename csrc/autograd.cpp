// Autograd of all operators, as one file to compile: most of what each of its own would take is the
// reading of torch's headers.
#include "cross_entropy_losses/autograd.cpp"

#include "pointwise_losses/autograd.cpp"
#include "student_t/autograd.cpp"
#include "superquantile/autograd.cpp"
