// NNI's web server has no password and listens on every interface. Loaded before it (node --require), this lets servers
// that name no address listen on that of GENAS_NNI_HOST, or on the loopback address alone.
'use strict';
const net = require('net');
const listen = net.Server.prototype.listen;
net.Server.prototype.listen = function (...given) {
    const host = process.env.GENAS_NNI_HOST || '127.0.0.1';
    if (typeof given[0] === 'number' && typeof given[1] !== 'string') {
        given.splice(1, 0, host);
    } else if (given[0] && typeof given[0] === 'object' && 'port' in given[0] && !given[0].host) {
        given[0] = { ...given[0], host };
    }
    return listen.apply(this, given);
};
