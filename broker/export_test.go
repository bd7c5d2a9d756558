package broker

// Connections is how many the embedded server has.
func (b *Broker) Connections() int { return b.srv.NumClients() }
